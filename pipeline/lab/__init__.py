"""What the core never imports: benchmarks, comparisons of methods, LM adaptation, training of all weights."""
