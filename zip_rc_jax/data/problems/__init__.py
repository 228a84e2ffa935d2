"""Problems with reference answers, from every source that the config names."""
