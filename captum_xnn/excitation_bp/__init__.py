"""Excitation backprop for any PyTorch code: to inputs, to layers, and from neurons, for many targets at once."""

from captum_xnn.excitation_bp._attribution import ExcitationBP, LayerExcitationBP, NeuronExcitationBP

__all__ = ["ExcitationBP", "LayerExcitationBP", "NeuronExcitationBP"]
