"""Krylov methods from a product alone: `matmul` on columns [..., n, k], batched, real or complex, in any precision."""
