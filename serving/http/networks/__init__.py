"""ControlNets and IP-Adapters as clients see them: what a request says of them, which there are, which fit the base."""
