"""What a role may: its document, what is refused in it, and whom its changes reach."""

from typing import Any

import pytest

from harperpy import TableRights, User
from harperpy.testing import RunningServer
from helpers import operation

WRONG: list[tuple[dict[str, Any], list[str], dict[str, list[str]]]] = [
    ({"super_usr": True}, ["super_usr: no such permission; did you mean super_user?"], {}),
    (
        {"super_user": True, "operations": ["sql"]},
        ["super_user: a super_user role takes no other permissions"],
        {},
    ),
    (
        {"super_user": True, "data": {"tables": {"notes": {"read": True}}}},
        ["super_user: a super_user role takes no other permissions"],
        {},
    ),
    ({"cluster_user": True}, ["cluster_user: expected false, there is no cluster"], {}),
    ({"super_user": "yes"}, ["super_user: Expected `bool`, got `str`"], {}),
    (
        {"resources": {"a": ["raed"]}},
        ["resources.a[0]: Invalid enum value 'raed'; expected read, create, update, delete"],
        {},
    ),
    (
        {"models": ["*-mini"]},
        ["models: '*-mini': expected a name, or its beginning with '*' at the end"],
        {},
    ),
    ({"elsewhere": {"tables": {}}}, [], {"elsewhere": ["database 'elsewhere' does not exist"]}),
    (
        {"system": {"tables": {"hdb_user": {"read": True}}}},
        [],
        {"system": ["system is read by super users alone, and written by nobody"]},
    ),
    (
        {"data": {"tables": {"notes": {"reed": True}}}},
        [],
        {"data": ["data: Object contains unknown field `reed` - at `$.tables[...]`"]},
    ),
    (
        {
            "models": "gpt",
            "data": {
                "tables": {
                    "notes": {
                        "read": True,
                        "attribute_permissions": [
                            {"attribute_name": "text", "read": True, "insert": True}
                        ],
                    }
                }
            },
        },
        ["models: Expected `array`, got `str`"],
        {"data": ["notes.text: insert is true, but false of the table"]},
    ),
]


@pytest.mark.parametrize(("document", "main", "schema"), WRONG)
async def test_a_wrong_document_is_refused_with_all_that_is_wrong_in_it(
    server: RunningServer,
    document: dict[str, Any],
    main: list[str],
    schema: dict[str, list[str]],
) -> None:
    """400, what is wrong with the main permissions, and what with each database."""
    body = {"operation": "add_role", "role": "x", "permission": document}

    assert await operation(server, body, f"Bearer {server.api_key}") == (
        400,
        {
            "error": "Errors in the role permissions JSON provided",
            "main_permissions": main,
            "schema_permissions": schema,
        },
    )


PATHS = {
    True: ["*", "", "v1", "v1/*", "v1/models", "user/:id", "user/:id/*", "files/*rest"],
    False: ["/v1", "/v1/*", "v1/", "/", "/*", "v1//models", "v1*", "v1/**", "v1/*/models", "*/v1"],
}


@pytest.mark.parametrize("right", PATHS)
async def test_a_path_that_no_mount_could_have_is_refused(
    server: RunningServer, *, right: bool
) -> None:
    """Nobody would notice that it opens nothing."""
    admin = f"Bearer {server.api_key}"
    for path in PATHS[right]:
        permission = {"resources": {path: ["read"]}}
        body = {"operation": "add_role", "role": f"of {path}", "permission": permission}
        status, told = await operation(server, body, admin)
        if right:
            assert (200, permission["resources"]) == (status, told["permission"]["resources"])
        else:
            assert 400 == status
            expected = "expected a mount such as 'v1/models', 'v1/*' for all beneath, or '*'"
            assert [f"resources: {path!r}: {expected}"] == told["main_permissions"]


async def user_of(server: RunningServer, permission: dict[str, Any]) -> User:
    """Who has a role of its own with this permission, as operations see them."""
    await server.operate("add_role", role="own", permission=permission)
    key = await server.key_for("ada", role="own")
    return await server.server.core.authenticators.identify(f"Bearer {key}")


async def test_a_document_is_kept_and_shown_as_it_was_given(server: RunningServer) -> None:
    """Databases stand beside the other permissions, for who lists roles too."""
    notes = {
        "read": True,
        "update": True,
        "attribute_permissions": [
            {"attribute_name": "text", "read": True, "insert": False, "update": True}
        ],
    }
    document = {
        "super_user": False,
        "structure_user": ["data"],
        "resources": {"notes": ["read"]},
        "operations": ["read_only", "sql"],
        "models": ["gpt-*", "local"],
        "data": {"tables": {"notes": notes}},
    }

    # Nothing to manage, and nothing to keep.
    given = {**document, "cluster_user": False}
    made = await server.operate("add_role", role="clerk", permission=given)
    listed = await server.operate("list_roles")

    assert {"id": "clerk", "role": "clerk", "permission": document} == made
    assert made in listed


async def test_rights_on_tables_are_by_table_action_and_attribute(server: RunningServer) -> None:
    """What is not said is not allowed; of the server's own tables nothing is."""
    listed = [{"attribute_name": "text", "read": True}]
    tables = {
        "notes": {"read": True, "delete": True, "attribute_permissions": listed},
        "tags": {"read": True, "insert": True},
    }
    user = await user_of(server, {"data": {"tables": tables}})
    rights = user.role.permission.table

    notes, tags = rights("data", "notes"), rights("data", "tags")
    assert (frozenset({"text"}), None) == (notes.attributes("read"), tags.attributes("read"))
    assert notes.allows("read", "text")
    assert not notes.allows("read", "text", "owner")
    assert notes.allows("delete")
    assert not notes.allows("update", "text")
    assert tags.allows("insert", "anything")
    for database, table in (("data", "else"), ("system", "hdb_user"), ("elsewhere", "notes")):
        assert TableRights() == rights(database, table)


async def test_a_super_user_reads_the_servers_own_tables_and_never_writes_them(
    server: RunningServer,
) -> None:
    """Of plugins' tables nothing is refused."""
    admin = await server.server.core.authenticators.identify(f"Bearer {server.api_key}")
    rights = admin.role.permission.table

    assert TableRights(read=True) == rights("system", "hdb_user")
    assert TableRights(read=True, insert=True, update=True, delete=True) == rights("data", "notes")


LISTED = [
    (None, [200, 403, 200]),
    ([], [403, 403, 403]),
    (["read_only"], [200, 403, 403]),
    (["standard_user"], [200, 403, 200]),
    (["list_users"], [403, 200, 403]),
    (["read_only", "list_users"], [200, 200, 403]),
]


@pytest.mark.parametrize(("listed", "expected"), LISTED)
async def test_operations_are_those_listed_or_those_open_to_all(
    server: RunningServer, listed: list[str] | None, expected: list[int]
) -> None:
    """`read_only` and `standard_user` are groups; a list leaves out what it does not name."""
    permission = {} if listed is None else {"operations": listed}
    await server.operate("add_role", role="own", permission=permission)
    key = await server.key_for("ada", role="own")
    bodies = (
        {"operation": "user_info"},
        {"operation": "list_users"},
        {"operation": "add_api_key", "name": "more"},
    )

    got = [(await operation(server, body, f"Bearer {key}"))[0] for body in bodies]

    assert expected == got


# How a role changes, and ends


def admin(server: RunningServer) -> str:
    """The first super user's header."""
    return f"Bearer {server.api_key}"


async def test_a_changed_role_counts_at_once(server: RunningServer) -> None:
    """For keys that are remembered too; it may get another name, and keeps its id."""
    await server.operate("add_role", role="clerk", permission={"operations": ["user_info"]})
    key = f"Bearer {await server.key_for('ada', role='clerk')}"
    body = {"operation": "list_users"}
    assert 403 == (await operation(server, body, key))[0]

    permission = {"operations": ["list_users"], "super_user": False, "resources": {}}
    changed = {"operation": "alter_role", "id": "clerk", "permission": permission, "role": "lister"}
    told = await operation(server, changed, admin(server))

    assert (200, {"id": "clerk", "role": "lister", "permission": permission}) == told
    assert 200 == (await operation(server, body, key))[0]
    assert 403 == (await operation(server, {"operation": "user_info"}, key))[0]


REFUSED: list[tuple[dict[str, Any], tuple[int, str]]] = [
    ({"operation": "alter_role", "id": "none", "permission": {}}, (400, "Invalid role id")),
    (
        {"operation": "alter_role", "id": "clerk", "permission": {}, "role": "super_user"},
        (409, "A role with name 'super_user' already exists"),
    ),
    (
        {"operation": "alter_role", "id": "super_user", "permission": {}},
        (409, "Cannot drop, demote or deactivate the last active super user"),
    ),
    (
        {"operation": "alter_role", "id": "clerk", "permission": {"operations": ["sqll"]}},
        (400, "Errors in the role permissions JSON provided"),
    ),
    ({"operation": "drop_role", "id": "none"}, (404, "Role not found")),
    (
        {"operation": "drop_role", "id": "super_user"},
        (409, "Cannot drop role super_user as it has active user(s) tied to this role"),
    ),
    (
        {"operation": "drop_role", "id": "clerk"},
        (409, "Cannot drop role clerk as it has active user(s) tied to this role"),
    ),
    (
        {"operation": "drop_role", "id": "retired"},
        (409, "Cannot drop role retired as it has inactive user(s) tied to this role"),
    ),
]


@pytest.mark.parametrize(("body", "expected"), REFUSED)
async def test_what_cannot_be_done_to_a_role_is_refused(
    server: RunningServer, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    """A role of somebody's stays, and there is a super user at all times."""
    for role, active in (("clerk", True), ("retired", False)):
        await server.operate("add_role", role=role, permission={})
        await server.operate(
            "add_user", username=f"a {role}", password="pw", role=role, active=active
        )
    before = await server.operate("list_roles")

    status, told = await operation(server, body, admin(server))

    assert expected == (status, told["error"])
    assert before == await server.operate("list_roles")


async def test_a_role_that_nobody_has_is_dropped(server: RunningServer) -> None:
    """Its id and its name are free again."""
    await server.operate("add_role", role="clerk", permission={})

    dropped = await operation(server, {"operation": "drop_role", "id": "clerk"}, admin(server))

    assert (200, {"message": "clerk successfully deleted"}) == dropped
    await server.operate("add_role", role="clerk", permission={})


async def test_changes_of_roles_leave_rows_in_the_audit(server: RunningServer) -> None:
    """From what to what, by whom and with which key."""
    await server.operate("add_role", role="clerk", permission={})
    for body in (
        {"operation": "alter_role", "id": "clerk", "permission": {"models": ["local"]}},
        {"operation": "drop_role", "id": "clerk"},
    ):
        await operation(server, body, admin(server))

    rows = (await server.operate("read_audit_log", table="hdb_role"))[:2]

    old = {"super_user": False, "resources": {}}
    new = {**old, "models": ["local"]}
    keys = {key.id for key in await server.operate("list_api_keys")}
    assert {row["key_id"] for row in rows} == keys
    assert [("HDB_ADMIN", "delete", ["clerk"]), ("HDB_ADMIN", "update", ["clerk"])] == [
        (row["user_name"], row["operation"], row["hash_values"]) for row in rows
    ]
    assert rows[0]["original_records"] == [{"id": "clerk", "role": "clerk", "permission": new}]
    assert rows[1]["original_records"] == [{"role": "clerk", "permission": old}]
    assert rows[1]["records"] == [{"role": "clerk", "permission": new}]
