// What the files of tests share.
#pragma once

#include <string>

extern int failures;

// Counts and prints a check that does not hold.
void expect(bool holds, const std::string& what);

void check_sharing();  // test_team.cpp
