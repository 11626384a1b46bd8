"""Metrics of explanations, as plain functions of tensors."""
