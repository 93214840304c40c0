"""Image classification on ImageFolder trees (ImageNet and smaller): the application on top of the engines."""
