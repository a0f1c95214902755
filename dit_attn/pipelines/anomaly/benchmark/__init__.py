"""Do made pairs help a segmenter? Real shots alone, next to cheap ways of making defects and to generated pairs."""
