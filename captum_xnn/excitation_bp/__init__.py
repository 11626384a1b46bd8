"""Excitation backprop for any PyTorch code: to inputs, layers, and from neurons, for many targets at once."""

from captum_xnn.excitation_bp.attribution import ExcitationBP, LayerExcitationBP, NeuronExcitationBP, total_mass

__all__ = ["ExcitationBP", "LayerExcitationBP", "NeuronExcitationBP", "total_mass"]
