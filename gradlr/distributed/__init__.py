"""Several processes: replicas that exchange sketches instead of gradients, and models that are sharded."""
