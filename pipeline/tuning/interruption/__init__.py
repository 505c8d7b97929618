"""How a run is interrupted without losing work: signals, requests to stop, hangs, and processes that vanish."""
