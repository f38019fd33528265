# SPDX-License-Identifier: Apache-2.0
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.workloads.notes import load_agents, note_turns

WORDS_OF_A_PAGE = 250


def test_there_are_five_agents_with_a_page_of_instructions_each() -> None:
    agents = load_agents()
    assert len({agent.name for agent in agents}) == 5
    for agent in agents:
        assert len(agent.system.split()) > WORDS_OF_A_PAGE


def test_system_prompts_share_no_prefix_that_prefix_caching_could_use() -> None:
    for one, other in combinations(load_agents(), 2):
        assert one.system[:20] != other.system[:20]


@settings(deadline=None)
@given(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=4))
def test_every_agent_reads_the_task_and_all_earlier_notes_word_for_word(
    task: str, texts: list[str]
) -> None:
    agents = load_agents()
    turn = note_turns(task, agents)[len(texts)]
    system, user = turn.messages(texts)
    assert system == {"role": "system", "content": agents[len(texts)].system}
    cursor = user["content"].index(task)
    for agent, text in zip(agents, texts, strict=False):
        cursor = user["content"].index(f"The {agent.name} has left", cursor)
        assert text in user["content"][cursor:]
    assert turn.primers[0].messages()[0] == system
