"""Classify images of ImageFolder trees: the application on top of the engines."""
