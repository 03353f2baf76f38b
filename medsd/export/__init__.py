"""What was trained, for others to run: MONAI's zoo bundle, ONNX, TorchScript, WSInfer."""
