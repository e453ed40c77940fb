"""What each parameter is: its kind, its view as matrices, its group."""
