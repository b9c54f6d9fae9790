"""Instruction data that a model writes: prompt programs, and what they refuse (OpenBezoar).

A program is what a parent model is asked, and what becomes of its words: requests out of seeds, instructions or the
name of a reason out of each answer, conversations or the name of a reason out of each response. Programs run no model;
`pipeline` is the order of things, with a function that asks one.
"""
