"""What runs the model."""
