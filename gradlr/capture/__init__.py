"""How gradients are taken out of backward: by hooks, or inside a layer's own backward."""
