"""Named backend: `torch.compile(model, backend="ssprop")`."""
