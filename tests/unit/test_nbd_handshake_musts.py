"""Every MUST of proto.md (and, marked ext, of its extension-ext-header branch) for a server in the handshake.

MUSTS maps the quoted sentence to tests in test_nbd_handshake_{server,contexts,tls}.py. ELSEWHERE has nearby sentences
about the transmission phase, TLS records or the client, with the reason why they are not in MUSTS.
"""

from __future__ import annotations

import ast
from pathlib import Path

MUSTS: dict[str, list[str]] = {
    "MUST NOT contain `NUL` characters, SHOULD be no longer than": [
        "test_names_that_are_no_strings_cannot_be_offered",
        "test_every_error_carries_a_string_of_the_protocol",
        "test_malformed_info_and_go_are_invalid_and_survived",
        "test_malformed_context_options_are_invalid_and_survived",
    ],
    "256 bytes and MUST be no longer than 4096 bytes.": [
        "test_names_that_are_no_strings_cannot_be_offered",
        "test_longest_names_and_unicode_go_both_ways",
        "test_export_name_that_is_no_string_ends_the_session",
    ],
    "the server MUST close the TCP connection if it does not recognize the client's flags": [
        "test_unknown_client_flag_drops_the_connection"
    ],
    "If the server is unwilling to allow the export, it MUST terminate the session.": [
        "test_export_name_of_an_unknown_export_ends_the_session",
        "test_shutting_down_an_export_name_drops",
    ],
    "A party that is mandated by this document to terminate the session MUST initiate a hard disconnect": [
        "test_export_name_of_an_unknown_export_ends_the_session"
    ],
    "A party MUST NOT initiate a hard disconnect save where set out in this section.": [
        "test_unknown_option_is_unsupported_and_the_next_one_is_understood",
        "test_data_with_an_option_that_takes_none_is_invalid_and_survived",
        "test_oversized_option_is_too_big_and_survived",
        "test_option_announcing_an_absurd_length_is_hung_up_on",
        "test_option_with_wrong_magic_drops_the_connection",
    ],
    "In the server's case it MUST (save where set out above) simply error inbound options": [
        "test_shutting_down_every_option_but_abort_gets_err_shutdown"
    ],
    "Note that without client negotiation, the server MUST use only simple replies": [
        "test_replies_are_simple_unless_structured_were_asked_for"
    ],
    "The server MUST support one of these modes.": [
        "test_starttls_is_unsupported",
        "test_forced_tls_refuses_every_option_but_starttls_and_abort",
        "test_selective_tls_serves_clients_without_it",
    ],
    "server MUST either reply with `NBD_REP_ACK` after which point the connection is upgraded to TLS": [
        "test_starttls_is_acknowledged_and_the_negotiation_begins_again",
        "test_starttls_with_data_is_invalid_and_survived",
    ],
    "When this command succeeds, the server MUST NOT preserve any negotiation state": [
        "test_nothing_that_was_negotiated_before_tls_counts_after_it"
    ],
    "TLS has already been negotiated, it MUST reply with `NBD_REP_ERR_INVALID`.": ["test_a_second_starttls_is_invalid"],
    "and unsupported options, it MUST reply with `NBD_REP_ERR_TLS_REQD` if TLS has not been initiated": [
        "test_forced_tls_refuses_every_option_but_starttls_and_abort"
    ],
    "via `NBD_OPT_EXPORT_NAME` when TLS has not been initiated, then as this request cannot error, it MUST": [
        "test_forced_tls_ends_the_session_after_an_export_name"
    ],
    "The server MUST NOT send `NBD_REP_ERR_TLS_REQD` in reply to any option if TLS has already been": [
        "test_nothing_requires_tls_that_has_begun"
    ],
    "In this case, a FORCEDTLS server MUST NOT send `NBD_REP_INFO` replies": [
        "test_forced_tls_refuses_every_option_but_starttls_and_abort"
    ],
    "it MUST be consistent in its mode of operation across the lifespan of a single TCP connection": [
        "test_no_option_is_ever_answered_with_tls_required"
    ],
    "The server MUST operate in NOTLS mode unless the server set flag `NBD_FLAG_FIXED_NEWSTYLE`": [
        "test_starttls_is_unsupported",
        "test_clients_without_fixed_newstyle_get_no_tls_and_hear_nothing_of_it",
    ],
    "If the server receives `NBD_OPT_STARTTLS` it MUST respond with `NBD_REP_ERR_POLICY`": [
        "test_starttls_is_unsupported"
    ],
    "The server MUST NOT respond to any option request with `NBD_REP_ERR_TLS_REQD`.": [
        "test_no_option_is_ever_answered_with_tls_required"
    ],
    "in response to `NBD_OPT_INFO` or `NBD_OPT_GO`, and MUST do so unless it has agreed on size constraints": [
        "test_size_constraints_other_than_the_default_are_told_when_asked"
    ],
    "If advertised, this value MUST be a power of 2, MUST NOT be larger than 2^16 (65,536)": [
        "test_impossible_size_constraints_cannot_be_offered"
    ],
    "If advertised, this MUST be a power of 2 at least as large as the maximum of the minimum block size and 2^9": [
        "test_impossible_size_constraints_cannot_be_offered"
    ],
    "it MAY be something other than a power of 2, but MUST be at least as large as the preferred block size": [
        "test_impossible_size_constraints_cannot_be_offered",
        "test_size_constraints_other_than_the_default_are_told_when_asked",
    ],
    "this implies that in order to use metadata querying, structured replies MUST be negotiated first.": [
        "test_contexts_before_structured_replies_are_invalid"
    ],
    "The name MUST consist of a namespace, followed by a colon, followed by a leaf-name.": [
        "test_malformed_context_options_are_invalid_and_survived",
        "test_listing_contexts_matches_queries",
    ],
    "(namespace, colon, and leaf-name) MUST follow the restrictions for strings": [
        "test_malformed_context_options_are_invalid_and_survived",
        "test_only_names_that_are_contexts_are_offered",
    ],
    "Namespaces MUST be consist of one of the following": ["test_listing_contexts_matches_queries"],
    "`base:` - the server MUST ignore this form during `NBD_OPT_SET_META_CONTEXT`": [
        "test_queries_that_select_nothing_are_acknowledged"
    ],
    "and MUST support this as a wildcard during `NBD_OPT_LIST_META_CONTEXT`": ["test_listing_contexts_matches_queries"],
    "If a `[leaf-name]` requested by the client is not recognized, the server MUST ignore it": [
        "test_listing_contexts_matches_queries",
        "test_queries_that_select_nothing_are_acknowledged",
    ],
    "bit 0, `NBD_FLAG_FIXED_NEWSTYLE`; MUST be set by servers that support the fixed newstyle protocol": [
        "test_greeting_sets_fixed_newstyle_and_no_zeroes_and_nothing_else"
    ],
    "the server MUST NOT send the 124 bytes of zero when the client ends negotiation with `NBD_OPT_EXPORT_NAME`.": [
        "test_export_name_sends_zeroes_unless_no_zeroes_was_agreed"
    ],
    "The server MUST NOT set any other flags, and SHOULD NOT change behaviour": [
        "test_greeting_sets_fixed_newstyle_and_no_zeroes_and_nothing_else"
    ],
    "If set, the server MUST NOT send the 124 bytes of zeroes when the client ends negotiation": [
        "test_export_name_sends_zeroes_unless_no_zeroes_was_agreed"
    ],
    "the server MUST drop the TCP connection if the client sets an unknown flag": [
        "test_unknown_client_flag_drops_the_connection"
    ],
    "The server MUST NOT set the flag for features it does not support.": [
        "test_flags_of_a_read_only_export_offer_no_way_to_write",
        "test_flags_nothing_implements_are_never_set",
        "test_multi_conn_is_not_promised_for_an_export_that_cannot",
    ],
    "bit 0, `NBD_FLAG_HAS_FLAGS`: MUST always be 1.": [
        "test_flags_of_a_writable_export",
        "test_flags_of_a_read_only_export_offer_no_way_to_write",
    ],
    "server MUST set this transmission flag to 1 if the `NBD_CMD_READ` request supports the `NBD_CMD_FLAG_DF` flag": [
        "test_flags_offer_df_only_with_structured_or_extended_replies"
    ],
    "MUST leave this flag clear if structured replies have not been negotiated.": [
        "test_flags_offer_df_only_with_structured_or_extended_replies"
    ],
    "server MUST set this transmission flag to 1 if the `NBD_CMD_WRITE_ZEROES` request supports": [
        "test_flags_of_a_writable_export"
    ],
    "MUST set this transmission flag to 0 if `NBD_FLAG_SEND_WRITE_ZEROES` is not set": [
        "test_fast_zero_never_comes_without_write_zeroes"
    ],
    "for an export where the server requires it), the server MUST terminate the session.": [
        "test_export_name_of_an_unknown_export_ends_the_session"
    ],
    "A server which wishes to use any other option MUST support fixed newstyle.": [
        "test_greeting_sets_fixed_newstyle_and_no_zeroes_and_nothing_else"
    ],
    "to abort the negotiation and terminate the session. The server MUST reply with `NBD_REP_ACK`.": [
        "test_abort_is_acknowledged_and_its_data_ignored"
    ],
    "The server MUST either reply with `NBD_REP_ACK` after which point the connection is upgraded to TLS": [
        "test_starttls_is_unsupported",
        "test_data_with_an_option_that_takes_none_is_invalid_and_survived",
    ],
    "32 bits, length of name (unsigned); MUST be no larger than the option data length - 6": [
        "test_malformed_info_and_go_are_invalid_and_survived"
    ],
    "The server MUST ignore any information requests it does not understand.": [
        "test_unknown_and_repeated_information_requests_are_ignored"
    ],
    "the server MUST NOT assume that such information requests are understood": [
        "test_info_export_is_told_unasked_and_has_twelve_bytes"
    ],
    "In this case, the server MUST send at least one `NBD_REP_INFO`, with an `NBD_INFO_EXPORT` information type.": [
        "test_info_export_is_told_unasked_and_has_twelve_bytes",
        "test_info_and_go_tell_the_export_and_what_was_asked",
    ],
    "The server MUST NOT send this error if size constraints were requested with `NBD_INFO_BLOCK_SIZE`": [
        "test_default_size_constraints_never_require_asking_for_them",
        "test_size_constraints_other_than_the_default_are_told_when_asked",
    ],
    "the server MUST reply with the same set of information": [
        "test_go_right_after_info_tells_the_same_even_if_the_size_changed",
        "test_go_after_another_option_tells_the_size_of_now",
    ],
    "The server MUST NOT send any zero padding bytes after the `NBD_REP_ACK` data": [
        "test_go_sends_nothing_behind_its_ack"
    ],
    "the server MUST use structured replies to the `NBD_CMD_READ` transmission request.": [
        "test_replies_are_simple_unless_structured_were_asked_for"
    ],
    "the server MUST fail the request with `NBD_REP_ERR_INVALID`.": [
        "test_malformed_context_options_are_invalid_and_survived"
    ],
    "the server MUST ignore query strings belonging to an unknown namespace.": [
        "test_listing_contexts_matches_queries",
        "test_queries_that_select_nothing_are_acknowledged",
    ],
    "the server MUST send a single reply of type `NBD_REP_ACK`.": ["test_listing_contexts_matches_queries"],
    "The server MUST reply with a list of zero or more `NBD_REP_META_CONTEXT` replies": [
        "test_listing_contexts_matches_queries"
    ],
    "If zero queries are sent, then the server MUST return all the metadata contexts": [
        "test_listing_contexts_matches_queries",
        "test_listing_finds_contexts_by_name_namespace_and_kind",
    ],
    "If one or more queries are sent, then the server MUST return those metadata contexts": [
        "test_listing_contexts_matches_queries",
        "test_listing_finds_contexts_by_name_namespace_and_kind",
    ],
    "each namespace returned MUST begin with the relevant namespace": [
        "test_listing_contexts_matches_queries",
        "test_listing_finds_contexts_by_name_namespace_and_kind",
        "test_only_names_that_are_contexts_are_offered",
    ],
    "replaces all previously-set metadata contexts (including when this command fails)": [
        "test_every_selection_replaces_the_one_before_even_if_it_fails"
    ],
    "This option MUST NOT be requested unless structured replies have been negotiated first.": [
        "test_contexts_before_structured_replies_are_invalid"
    ],
    "the final time it was sent, it referred to the same export name": [
        "test_selection_holds_only_for_its_export",
        "test_a_selection_for_one_export_is_none_for_another_that_has_the_same_contexts",
    ],
    "If zero queries are sent, the server MUST select no metadata contexts.": [
        "test_queries_that_select_nothing_are_acknowledged"
    ],
    "Otherwise the server MUST reply with a number of `NBD_REP_META_CONTEXT` replies": [
        "test_selected_context_gets_the_id_transmission_uses",
        "test_several_contexts_are_selected_at_once_each_with_an_id_of_its_own",
    ],
    "32 bits, length of name (unsigned); MUST be no larger than the reply packet header length - 4": [
        "test_list_names_every_export_and_ends_with_ack"
    ],
    "The server MUST send an `NBD_INFO_EXPORT` information type at some point before sending an `NBD_REP_ACK`": [
        "test_info_export_is_told_unasked_and_has_twelve_bytes"
    ],
    "*length* MUST be 12, and the reply payload is interpreted as follows": [
        "test_info_export_is_told_unasked_and_has_twelve_bytes"
    ],
    "The *length* MUST be at least 2, and the reply payload is interpreted as": [
        "test_info_and_go_tell_the_export_and_what_was_asked"
    ],
    "The server MUST send this info if it is requested and it intends to enforce size constraints": [
        "test_size_constraints_other_than_the_default_are_told_when_asked"
    ],
    "The *length* MUST be 14, and the reply payload is interpreted as": [
        "test_info_and_go_tell_the_export_and_what_was_asked"
    ],
    "but it MUST be valid UTF-8 data.": ["test_selected_context_gets_the_id_transmission_uses"],
    "The following MUST be implemented by all implementations": [
        "test_info_and_go_tell_the_export_and_what_was_asked",
        "test_abort_is_acknowledged_and_its_data_ignored",
        "test_list_names_every_export_and_ends_with_ack",
    ],
    "Servers that receive messages which they do not implement MUST reply to them with `NBD_REP_ERR_UNSUP`": [
        "test_unknown_option_is_unsupported_and_the_next_one_is_understood"
    ],
    "ext: MUST leave this flag clear if neither structured replies nor extended headers have been negotiated.": [
        "test_flags_offer_df_only_with_structured_or_extended_replies"
    ],
    "ext: Servers MUST NOT advertise this bit unless the client successfully negotiates extended headers": [
        "test_flags_nothing_implements_are_never_set"
    ],
    "ext: a client that has used `NBD_OPT_EXTENDED_HEADERS` to negotiate extended headers MUST NOT use this option.": [
        "test_export_name_after_extended_headers_ends_the_session"
    ],
    "ext: the server MUST NOT fail `NBD_OPT_GO` with `NBD_REP_ERR_UNSUP`.": [
        "test_extended_headers_need_no_structured_replies_and_imply_them"
    ],
    "ext: When successful, this option takes precedence over structured replies, and the server MUST also support": [
        "test_extended_headers_need_no_structured_replies_and_imply_them",
        "test_structured_reply_after_extended_headers_says_so",
    ],
    "ext: and the server MUST use the 32-byte extended reply header.": [
        "test_extended_headers_need_no_structured_replies_and_imply_them"
    ],
    'ext: server MUST NOT use this failure mode when the response is limited to the "base:" namespace': [
        "test_no_base_context_ever_requires_extended_headers"
    ],
    'ext: The server MUST NOT use this failure for a client request that is limited to contexts in the "base:"': [
        "test_no_base_context_ever_requires_extended_headers"
    ],
}

ELSEWHERE: dict[str, str] = {
    "If this flag is set, the server MUST error subsequent write operations to the export.": "transmission: engine",
    "`NBD_CMD_FLAG_FUA` MUST be visible across all connections when the server sends its reply": "transmission: engine",
    "On success, the server MUST respond with one structured reply chunk": "transmission: engine",
    "MUST cleanly error commands that fall outside the constraints without corrupting data": "transmission: engine",
    "each with a unique metadata context ID": "there is one context only",
    "the server MUST be prepared for a TLS handshake": "I/O: tests/interop/test_tls.py",
    "the server MUST terminate the session as by this stage it is too late": "I/O: tests/interop/test_tls_abuse.py",
    "NBD implementations supporting TLS MUST support TLS version 1.2": "I/O: tests/interop/test_tls.py",
    "the server MUST close down the TLS session (if one is running)": "transmission: tests/interop/test_tls_abuse.py",
    "The server MUST NOT set any of these flags during oldstyle negotiation.": "no oldstyle negotiation",
}


def test_every_must_names_tests_that_exist() -> None:
    sources = [
        Path(__file__).with_name(f"test_nbd_handshake_{part}.py").read_text() for part in ("server", "contexts", "tls")
    ]
    tests = {node.name for source in sources for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for quoted, named in MUSTS.items():
        assert named, quoted
        assert tests.issuperset(named), quoted


def test_no_must_is_both_pinned_and_elsewhere() -> None:
    assert not MUSTS.keys() & ELSEWHERE.keys()
