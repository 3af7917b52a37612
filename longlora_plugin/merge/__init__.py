"""What a merge needs before and after Axolotl's own."""
