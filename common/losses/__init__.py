"""Losses: functions of logits (B, K, H, W) and labels (B, H, W), the equation in each docstring."""
