"""Data sets from elsewhere: what is known of them, HTTP, archives, and the folder that they land in."""
