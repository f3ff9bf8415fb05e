"""How good a checkpoint is beside other ways to the same bits."""
