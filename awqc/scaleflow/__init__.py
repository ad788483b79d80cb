"""Scale flow: who can absorb a linear's input scale, for whom, and the proof."""
