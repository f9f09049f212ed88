"""What only runs kernels: which windows a call has, where its tensors lie, and the launches of each plan."""
