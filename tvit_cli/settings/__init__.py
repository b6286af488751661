"""What a user can set: pydantic models, one per verb, and the layers that they are read from."""
