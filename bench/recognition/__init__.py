"""Backbones, margin heads, training and verification of recognisers."""
