"""Read a split's images: sources, transforms, samplers, loaders."""
