"""What a run shows when it is done: charts, pictures, one self-contained page."""
