"""sites/datasets"""
