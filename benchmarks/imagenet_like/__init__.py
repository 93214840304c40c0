"""Train the ImageNet recipe on a smaller set of images, by SGD, AdamW and ARSG, through `arsg-imagenet` itself."""
