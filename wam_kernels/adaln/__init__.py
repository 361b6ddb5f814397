from .op import ada_layer_norm, gate_residual_ada_layer_norm

__all__ = ["ada_layer_norm", "gate_residual_ada_layer_norm"]
