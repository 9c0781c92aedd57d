"""Changes made to a loaded model. Their order is fixed by fasttrain.components.TRANSFORM_ORDER."""
