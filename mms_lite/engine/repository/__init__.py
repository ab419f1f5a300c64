"""What is on disk, turned into ModelSpecs: one module for each way in which people package models."""
