"""Settings of each verb as pydantic models, with the layers that they are read from."""
