"""Device meshes, sharding, sequence layout, and models that run in several processes."""
