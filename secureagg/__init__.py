"""secureagg"""
