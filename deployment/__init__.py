"""Real deployments of a Flower App: certificates, SuperLink and SuperNodes, on one host or several.

``python -m deployment demo`` runs one on this host; with ``cloud.yaml`` and ``device.yaml`` Docker
Compose starts one on several.
"""
