"""Serving on Ray: the deployments, the engines as the HTTP app sees them, and the router."""
