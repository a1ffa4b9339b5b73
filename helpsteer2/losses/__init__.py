"""One small callable per loss: inputs in, loss sum and count out."""
