"""How weights lie on disk: our store, and the layouts of other projects."""
