"""Excitation backprop for any PyTorch code: to inputs, to layers, and from neurons, for many targets at once."""

from captum_xnn.excitation_bp._attribution import ExcitationBP, LayerExcitationBP, NeuronExcitationBP
from captum_xnn.excitation_bp._stopping import stopping_layer

__all__ = ["ExcitationBP", "LayerExcitationBP", "NeuronExcitationBP", "stopping_layer"]
