// The threads' working memory.
#pragma once

namespace selftest {

void test_scratch();

}  // namespace selftest
