"""Which settings give general ability back, at equal safety: many fine-tunings of the demo's world, over several seeds."""
