"""The edges: the plan, the graph, the workers, the flow, the tracking and the command line."""
