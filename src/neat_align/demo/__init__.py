"""What the demo ships: a small real model (found, not bundled), prompts written for it, and tone
anchors.
"""
