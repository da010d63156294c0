"""Networks that anybody may build: backbones, margin heads, recognisers, augmentation, ONNX."""
