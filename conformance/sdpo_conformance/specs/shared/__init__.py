"""What several specs are built of: divergences over categories, a ratio, masks, a pipeline of named parts."""
