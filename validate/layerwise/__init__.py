"""An artifact's graph, layer by layer → hidden states, rings and activation ranges, beside a reference's."""
