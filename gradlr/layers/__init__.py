"""One truth per layer type: its matrix view and its linear map."""
