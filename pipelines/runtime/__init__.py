"""Where jobs meet Ray: the cluster they join or start, what they ask of it, what it
sees of them.
"""
